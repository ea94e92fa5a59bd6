"""The groups of sub-commands, one module each; they share `cli.session`."""
