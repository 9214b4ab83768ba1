"""What a command printed, for tests of what people see."""


def error_in(err: str) -> str:
    """The error on stderr: one or two lines, at most two lines of what was being done before them."""
    before, mark, error = f"\n{err}".rpartition("\nerror: ")
    assert mark, err
    assert len(before.strip().splitlines()) <= 2, err
    assert len(error.splitlines()) <= 2, err
    return f"error: {error}"
