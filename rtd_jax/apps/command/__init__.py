"""How every command is started: its flags, its help, and one line for what goes wrong."""
