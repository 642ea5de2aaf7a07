"""One reader for each format of an untrusted file.

Each has limits (bytes, depth, number of values) that hold before memory is asked for, executes nothing, and raises nothing
but `Malformed`, a UserError, for what is in a file. What the system says about the file (it is not there, may not be read)
stays the OSError that it is, so that "cannot be read now" and "is damaged" are not taken for each other.
"""
