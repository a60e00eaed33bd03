"""Files that one process at a time holds. The system gives them free when the process ends, however it ends."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_nft.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems that know none hold nobody off


@contextmanager
def exclusive(file: Path, in_use: UserError) -> Iterator[None]:
    """Hold a file while the block lasts. Raises `in_use` where another process holds it."""
    with open(file, "w") as opened:  # for writing: NFS locks nothing else
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
