"""A real browser for tests: Chromium without a window, driven over a pipe in its own protocol."""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
REQUIRED = 'REPLK_MM_REQUIRE_BROWSER'
_LIMIT_SECONDS = 120
# Chromium reads commands from 3 and answers on 4.
_LAUNCHER = (
    'import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])'
)


def find() -> str:
    """The browser; skips the test where there is none, and fails it there if ``REPLK_MM_REQUIRE_BROWSER=1``."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        said = f'no browser on PATH ({", ".join(NAMES)})'
        if os.environ.get(REQUIRED) == '1':
            pytest.fail(f'{said}, and {REQUIRED}=1')
        pytest.skip(said)
    return found


class Browser:
    """One page in Chromium.

    Args:
        profile: A folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        path = find()
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                '-c',
                _LAUNCHER,
                *map(str, ends),
                path,
                '--headless',
                '--no-sandbox',
                '--disable-gpu',
                '--disable-dev-shm-usage',
                '--no-first-run',
                f'--user-data-dir={profile}',
                '--remote-debugging-pipe',
                'about:blank',
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, theirs_in, theirs_out):
            os.close(end)
        self._in, self._out, self._buffer, self._ids = ours_in, ours_out, b'', itertools.count(1)
        self.events: list[dict] = []
        self._session = None
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self._session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self.send(f'{domain}.enable')

    def send(self, method: str, **parameters):
        """A command of the DevTools protocol; returns its answer."""
        number = next(self._ids)
        message = dict(
            id=number, method=method, params=parameters, **(dict(sessionId=self._session) if self._session else {})
        )
        os.write(self._out, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._receive()
            if answer.get('id') == number:
                assert 'error' not in answer, f'{method}: {answer["error"]}'
                return answer['result']
            self.events.append(answer)

    def _receive(self) -> dict:
        end = time.monotonic() + _LIMIT_SECONDS
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._in, 1 << 16) if ready else b''
            assert part, 'the browser has ended' if ready else f'the browser has not answered in {_LIMIT_SECONDS} s'
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there."""
        self.events.clear()
        self.send('Page.navigate', url=page.absolute().as_uri())
        while not any(event.get('method') == 'Page.loadEventFired' for event in self.events):
            self.events.append(self._receive())

    def run(self, script: str):
        """The value of an expression in the page."""
        found = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in found, found['exceptionDetails']
        return found['result'].get('value')

    def size(self, width: int, height: int = 900) -> None:
        """The size of the window in CSS pixels."""
        self.send(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, scheme: str, media: str = '') -> None:
        """Light or dark, screen or print."""
        self.send('Emulation.setEmulatedMedia', media=media, features=[dict(name='prefers-color-scheme', value=scheme)])

    def press(self, key: str, code: int, text: str = '') -> None:
        """A key of the keyboard."""
        for kind in ('keyDown', 'keyUp'):
            self.send(
                'Input.dispatchKeyEvent',
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(dict(text=text) if kind == 'keyDown' and text else {}),
            )

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
