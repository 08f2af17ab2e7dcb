"""The parts of the command line, one file each; a child process lies beside its parent."""
