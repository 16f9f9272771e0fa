"""A few of the mutations of tests/chaos.py, so that what it found does not come back."""

import signal

from chaos import FAULTS, run


def test_nothing_that_was_damaged_is_read_without_a_word(tmp_path, capsys):
    """Whatever is done to a file that the project wrote: it is refused by name, told apart, or of no consequence."""
    before = signal.getsignal(signal.SIGALRM)
    try:
        results = run(tmp_path, per_target=12)
    finally:
        signal.signal(signal.SIGALRM, before)
    capsys.readouterr()  # what the commands print
    assert len(results) > 150
    faults = [str(result) for result in results if result.outcome in FAULTS]
    assert not faults, "\n".join(faults)
    # Mutations that all go unnoticed because nothing is read would pass, too.
    assert sum(result.outcome == "named" for result in results) > len(results) / 4
