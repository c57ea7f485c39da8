"""Command handlers: one function per command, named like the command.

A batched handler gets all commands of its type in a batch and returns as many replies, in order. Other handlers get
one command and return one reply. Handlers run their statements in the given write session and pass on the errors of
the database.
"""
