"""One file for each command that is not LightningCLI: plain functions whose arguments are the options."""
