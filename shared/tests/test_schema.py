import random

import pytest

from sandbox_broker.database.schema import prefix_end


@pytest.mark.parametrize("prefix", ["a", "lab-", "zz", "100%", "a_b", "~", " ", "a~", "\\"])
def test_prefix_range_contains_exactly_the_names_with_the_prefix(prefix: str) -> None:
    chance = random.Random(prefix)
    letters = sorted({*prefix, *" !%*_\\az~\x7féあ\U0001f600"})
    names = [prefix + tail for tail in ("", "x", "\U0010ffff", "~~")]
    names += ["".join(chance.choices(letters, k=chance.randrange(1, 5))) for _ in range(500)]
    for name in names:
        assert (prefix <= name < prefix_end(prefix)) == name.startswith(prefix)
