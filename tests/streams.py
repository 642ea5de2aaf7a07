"""Streams that say that they are terminals."""

import io


class ATerminal(io.TextIOWrapper):
    """One that keeps what is written, in an encoding."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace", write_through=True)

    def isatty(self) -> bool:
        """Yes."""
        return True

    def getvalue(self) -> str:
        """What was written."""
        return self.buffer.getvalue().decode(self.encoding)
