"""What the allocator does for each command: one function each, named like its command.

A handler gets all commands of its kind in a batch and answers with as many replies, in order. It runs its
statements on the writer's connection under the epoch given, and raises what the database raises.
"""
