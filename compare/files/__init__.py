"""Everything that is read or written by name goes through this package.

`reading` is the one door in, `writing` the one door out, `memory` the budget of what is read, and
`printable` makes text from outside safe to print.
"""
