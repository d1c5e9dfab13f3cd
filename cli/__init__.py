"""The command line: flags, the settings that they become, and each mode in a file of its own."""
