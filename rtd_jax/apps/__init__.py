"""What a user starts: one room per command of launch/. An app imports the core and `apps.report`, no other app."""
