"""What a user starts: one room per command of `command.py`. An app imports the core and `apps.report`, no other app."""
