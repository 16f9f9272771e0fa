"""Replies of a model, most often one behind a server: what is asked, how it is sent, and the log that resumes."""
