"""The parts of the command line, one file each. Child processes lie beside their parents."""
