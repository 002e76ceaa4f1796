"""What a pickle can do to whoever loads it."""

import os


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
