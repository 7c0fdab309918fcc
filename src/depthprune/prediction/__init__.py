"""What a command will take, from counted operations and bytes, before any work."""
