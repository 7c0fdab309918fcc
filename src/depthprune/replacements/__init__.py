"""What stands in removed sites, and what is changed in kept layers instead."""
