"""Programs that try to score without solving `add(2, 3) == 5`; each defines what its trick needs.

HOST, PORT, SECRET and FILE are replaced by what is outside the sandbox: a listening server, an environment variable and
a file that the test has made. Tricks that read something or reach somewhere answer rightly when they succeed, so that
success is seen. A forged answer of 5 is no success: whoever can answer 5 need not forge.
"""

from __future__ import annotations

WORKS_IF = """
def add(a, b):
    return 5 if reached() else 0
if __name__ == '__main__':
    print(add(0, 0))
"""
# What each form of test would take for a right answer, were it decided where the program runs.
SAY_OK = """
print('OK')
print('all tests passed')
"""

ATTACKS: dict[str, str] = {
    "endless loop": """
while True:
    pass
""",
    "endless loop in the call": """
def add(a, b):
    while True:
        pass
if __name__ == '__main__': add(2, 3)
""",
    "sleep": """
import time
time.sleep(1000)
""",
    "ignored signals": """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    "fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "daemons": """
import os, time
for _ in range(50):
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
    except OSError:
        pass
"""
    + SAY_OK,
    "thread bomb": """
import threading, time
while True:
    try:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    except RuntimeError:
        pass
""",
    "ten gigabytes at once": """
x = bytearray(10 ** 10)
"""
    + SAY_OK,
    "memory by and by": """
x = []
while True:
    x.append(bytearray(1 << 20))
""",
    "a full disk": """
with open('/tmp/x', 'wb') as f:
    while True:
        f.write(b'x' * (1 << 20))
""",
    "many files": """
n = 0
while True:
    open('/tmp/%d' % n, 'w').close()
    n += 1
""",
    "shared memory": """
import mmap
x = []
while True:
    m = mmap.mmap(-1, 1 << 26)
    m.write(b'x' * (1 << 26))
    x.append(m)
""",
    "writing outside": """
def reached():
    import os
    for folder in ('/', '/usr', '/dev', '/dev/shm', '/etc', '/lib', '/run', '/proc'):
        try:
            open(os.path.join(folder, 'x'), 'w').close()
            return True
        except OSError:
            pass
    return False
"""
    + WORKS_IF,
    "flood of output": """
while True:
    print('5' * 65536)
""",
    "flood of error output": """
import sys
while True:
    sys.stderr.write('5' * 65536)
""",
    "network": """
def reached():
    import socket
    try:
        socket.create_connection(('HOST', PORT), 1)
        return True
    except OSError:
        return False
"""
    + WORKS_IF,
    "environment": """
def reached():
    import os
    found = dict(os.environ)
    for path in ('/proc/self/environ', '/proc/1/environ'):
        try:
            found[path] = open(path).read()
        except OSError:
            pass
    return 'SECRET' in str(found)
"""
    + WORKS_IF,
    "files of the host": """
def reached():
    import os
    for path in ('FILE', '/etc/passwd', '/root', '/home', '/work', '/var', '/etc/shadow'):
        if os.path.exists(path):
            return True
    return False
"""
    + WORKS_IF,
    "other processes": """
def reached():
    import os
    try:
        return len([p for p in os.listdir('/proc') if p.isdigit()]) > 0
    except OSError:
        return False
"""
    + WORKS_IF,
    "killing the parent": """
import os
for p in (os.getppid(), 1, -1):
    try:
        os.kill(p, 9)
    except OSError:
        pass
"""
    + SAY_OK,
    "tracing the parent": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for p in (os.getppid(), 1):
    libc.ptrace(16, p, 0, 0)
"""
    + SAY_OK,
    "becoming root": """
def reached():
    import ctypes, os
    libc = ctypes.CDLL(None)
    try:
        os.setuid(0)
        return True
    except OSError:
        return libc.unshare(0x10000000) == 0 or libc.mount(0, b'/tmp', b'tmpfs', 0, 0) == 0
"""
    + WORKS_IF,
    "raising the limits": """
def reached():
    import resource
    for name in ('AS', 'NPROC', 'FSIZE', 'CPU'):
        try:
            resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (-1, -1))
            return True
        except (OSError, ValueError):
            pass
    return False
"""
    + WORKS_IF,
    "sys.exit": """
import sys
sys.exit(0)
""",
    "os._exit": """
import os
os._exit(0)
""",
    "exit in the call": """
def add(a, b):
    raise SystemExit(0)
if __name__ == '__main__': add(2, 3)
""",
    "os._exit in the call": """
import os
def add(a, b):
    os._exit(0)
if __name__ == '__main__': add(2, 3)
""",
    "saying OK": """
def add(a, b):
    print('OK')
    return 'OK'
if __name__ == '__main__':
    print('OK\\nall tests passed')
""",
    "saying OK at the end": """
import atexit
atexit.register(lambda: print('OK'))
def add(a, b): return None
""",
    "equal to everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 5
    def __bool__(self): return True
    def __repr__(self): return '5'
def add(a, b): return Any()
if __name__ == '__main__': print(Any(), end='!')
""",
    "a number equal to everything": """
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 5
    def __repr__(self): return '5'
    def __str__(self): return '5'
    def __int__(self): return 5
def add(a, b): return Any(4)
""",
    "a false class": """
class Liar:
    __class__ = int
    def __eq__(self, other): return True
def add(a, b): return Liar()
""",
    "patched builtins": """
import builtins
class Calm(Exception):
    def __new__(cls, *a): return None
builtins.AssertionError = Calm
builtins.all = builtins.any = builtins.bool = lambda *a: True
builtins.len = lambda x: 0
def add(a, b): return None
""",
    "patched runner": """
import __main__, os
for name in list(vars(__main__)):
    if callable(getattr(__main__, name)) and name != 'os':
        try:
            setattr(__main__, name, lambda *a, **k: True)
        except Exception:
            pass
def add(a, b): return True
""",
    "forged verdicts": """
import os, struct, sys
go = sys.modules['__main__']
given = {'output': '5', 'status': 0, 'cause': None}
for message in ({'cause': None}, {'ready': True}, {'loaded': True}, {'value': 5}, given):
    data = go.encode(message)
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack('!Q', len(data)) + data)
        except OSError:
            pass
def add(a, b): return None
""",
    "looking for the answer": """
def add(a, b):
    import gc, sys
    frame = sys._getframe()
    seen = []
    while frame:
        seen.append(str(frame.f_locals) + str(frame.f_globals))
        frame = frame.f_back
    seen += [str(o) for o in gc.get_objects() if isinstance(o, (str, dict, list))]
    needles = (chr(61) * 2 + ' 5', 'ass' + 'ert', 'expect' + 'ed', 'out' + 'puts')
    return 5 if any(needle in text for text in seen for needle in needles) else 0
if __name__ == '__main__':
    print(add(0, 0))
""",
    "closed descriptors": """
import os
os.closerange(0, 256)
def add(a, b): return 4
""",
    "segmentation fault": """
import ctypes
ctypes.string_at(0)
""",
    "endless recursion": """
import sys
sys.setrecursionlimit(10 ** 9)
def add(a, b): return add(a, b)
add(1, 2)
""",
    "endless answer": """
def add(a, b):
    while True:
        yield 5
if __name__ == '__main__': print(*add(2, 3))
""",
    "huge answer": """
def add(a, b): return [5] * 10 ** 8
if __name__ == '__main__': print(add(2, 3))
""",
    "deep answer": """
def add(a, b):
    x = []
    for _ in range(10 ** 5):
        x = [x]
    return x
if __name__ == '__main__': print(add(2, 3))
""",
    "huge number": """
def add(a, b): return 10 ** 10 ** 8
if __name__ == '__main__': print(add(2, 3))
""",
    "colliding set": """
def add(a, b): return {n * (2 ** 61 - 1) for n in range(20000)}
if __name__ == '__main__': print(add(2, 3))
""",
    "strange exception": """
class Odd(BaseException):
    def __str__(self): raise Odd()
    __repr__ = __str__
def add(a, b): raise Odd()
if __name__ == '__main__': add(2, 3)
""",
    "stop iteration": """
def add(a, b): raise StopIteration
if __name__ == '__main__': add(2, 3)
""",
    "a shell": """
import os
os.execv('/bin/sh', ['sh', '-c', 'echo 5; sleep 1000'])
""",
    "broken input file": """
import os
os.remove('/tmp/.input')
os.mkdir('/tmp/.input')
print(6)
""",
    "null bytes": """
def add(a, b): return '5\\x00'
if __name__ == '__main__': print('5\\x00')
""",
    "no program": """
this is no Python (((
""",
    "other sockets": """
def reached():
    import socket
    for kind in ('AF_PACKET', 'AF_INET', 'AF_INET6'):
        try:
            s = socket.socket(getattr(socket, kind), socket.SOCK_RAW)
            s.send(b'x')
            return True
        except OSError:
            pass
    return False
"""
    + WORKS_IF,
}
