"""Datagrams by which the processes of a run know that the others live, move, and where they are.

Every process sends all others one a second, from a thread of its own. A store that one of them keeps, as torch has it, would
go down with that one, and leave the others without a way to agree.
"""
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank

from replk_mm.engine.gather import share

#: Code in which a process waits for others: collectives, and the backward pass, which adds up gradients on the way.
_WAITING = ('/torch/distributed/', '/torch/autograd/')


@dataclass
class Peer:
    """What is known of a process.

    Attributes:
        rank: Its number.
        pid: Its process on its machine.
        host: Name of the machine.
        machine: What tells machines, and containers on one, apart.
        address: Where its datagrams come from.
        heard: When the last one came, None before the first.
        iteration: Where it is.
        place: The line of code that it runs.
        waiting: Whether that line waits for other processes.
        still: Seconds since it finished a step of any kind, as of ``heard``.
        end: None while it runs, '' once it has left in order, else what it failed of.
        ended: When it said so.
    """

    rank: int
    pid: int
    host: str
    machine: str
    address: tuple[str, int]
    heard: float | None = None
    iteration: int = 0
    place: str = ''
    waiting: bool = False
    still: float = 0.
    end: str | None = None
    ended: float = 0.

    def __str__(self) -> str:
        return f'rank {self.rank} (process {self.pid} on {self.host})'

    def state(self) -> str:
        """Linux's letter for the process, ``'X'`` if there is none any more, ``'?'`` if it cannot be seen from here."""
        if self.machine != _machine():
            return '?'
        try:
            return Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return 'X' if Path('/proc/self/stat').exists() else '?'
        except OSError:
            return '?'


@dataclass
class Own:
    """Where this process is; the training thread writes it."""

    iteration: int = 0
    moved: float = field(default_factory=time.monotonic)
    thread: int = field(default_factory=threading.get_ident)

    def place(self) -> tuple[str, bool]:
        """The line that the training thread runs, and whether it waits there for other processes."""
        frame = sys._current_frames().get(self.thread)
        if frame is None:
            return '', False
        file = frame.f_code.co_filename
        short = '/'.join(Path(file).parts[-3:])
        return f'{short}:{frame.f_lineno} {frame.f_code.co_name}', any(part in file for part in _WAITING)


class Line:
    """The socket of this process, and what it has heard of the others.

    Building one is for all processes of the run at once: they tell each other their addresses.
    """

    def __init__(self) -> None:
        family, address = _own_address()
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(('', 0))
        own = dict(run=os.urandom(16).hex(), pid=os.getpid(), host=socket.gethostname(), machine=_machine(),
                   address=[address, self._socket.getsockname()[1]])
        told = share(own)
        self.run = told[0]['run']
        self.rank = get_rank()
        self.peers = [Peer(rank, one['pid'], one['host'], one['machine'], tuple(one['address']))
                      for rank, one in enumerate(told) if rank != self.rank]
        self.own = Own()

    def beat(self) -> None:
        """Tell the others where this process is."""
        place, waiting = self.own.place()
        self.send(iteration=self.own.iteration, place=place, waiting=waiting, still=time.monotonic() - self.own.moved)

    def step(self) -> None:
        """Tell those that would speak for all, between two beats, of an iteration."""
        self.send(_below=2, iteration=self.own.iteration, still=0.)

    def send(self, _below: int | None = None, **what: Any) -> None:
        """Tell the others, or the ranks below a number, something; what does not go out is lost, as datagrams may be."""
        data = json.dumps(dict(run=self.run, rank=self.rank, **what)).encode()
        for peer in self.peers if _below is None else [peer for peer in self.peers if peer.rank < _below]:
            try:
                self._socket.sendto(data, peer.address)
            except OSError:  # its machine may be gone, which its silence will tell
                continue

    def receive(self, until: float) -> dict | None:
        """The next that another process says, None when it is ``until`` on :func:`time.monotonic`'s clock."""
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                data, address = self._socket.recvfrom(65536)
                said = json.loads(data)
            except (OSError, ValueError):
                continue
            peer = next((p for p in self.peers if isinstance(said, dict) and said.get('rank') == p.rank), None)
            if peer is None or said.get('run') != self.run:
                continue  # of another run, which had this port before
            now = time.monotonic()
            # A machine may know itself by an address that others cannot use; what arrives has one they can.
            peer.heard, peer.address = now, address[:2]
            if 'end' in said:
                peer.end, peer.ended = said['end'], now
            else:
                for name in ('iteration', 'place', 'waiting', 'still'):
                    setattr(peer, name, said.get(name, getattr(peer, name)))
            return said
        return None

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


def _own_address() -> tuple[int, str]:
    """Family and address of the interface by which the run's first machine is reached."""
    family, _, _, _, master = socket.getaddrinfo(os.environ.get('MASTER_ADDR') or '127.0.0.1', 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(master)  # sends nothing
        return family, probe.getsockname()[0]


def _machine() -> str:
    """What tells machines apart, and containers that number processes on their own."""
    parts = [socket.gethostname()]
    try:
        parts += [Path('/proc/sys/kernel/random/boot_id').read_text().strip(), str(Path('/proc/self/ns/pid').readlink())]
    except OSError:
        parts.append('no /proc')
    return ' '.join(parts)
