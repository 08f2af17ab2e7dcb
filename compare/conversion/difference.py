"""One thing that a torch layer and its Flax layer say differently."""

from typing import NamedTuple


class Difference(NamedTuple):
    """One thing that two layers say differently.

    Attributes:
        fact: the name of torch's argument, or of Flax's if torch has none.
        torch: what torch says, as code.
        flax: what Flax says, as code.
        mend: how to make them equal.
        trains_alone: whether the outputs of inference are the same.
    """

    fact: str
    torch: str
    flax: str
    mend: str
    trains_alone: bool = False
