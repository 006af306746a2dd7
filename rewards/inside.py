"""What runs inside a sandbox: the process of a model's program, and the process of the tests that call it.

This file is sent to the sandbox's interpreter as code and imports as little as it can, since it starts for every
completion. The program's process holds nothing that is worth stealing: no expected output, no test. All that leaves
it are answers to calls, as plain data: whatever the program patches, prints, writes or ends, it can but answer.
Roles, by argv: `program FD`, `tests FD PROGRAM_FD`, `version`.
"""

import os
import select
import sys
import time

from .wire import Gone, builder, decode, encode, receive, send


def limit(limits):
    """Set this process's limits, which everything it starts inherits and nothing inside can raise."""
    import resource

    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def mute():
    """Point standard input, output and error at nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


def serve_program(channel):
    """Load the program that the first message holds, and answer calls (or run it once for every standard input)."""
    task = receive(channel, builder(None))
    limit(task["limits"])
    mute()
    send(channel, {"ready": True})
    namespace = {"__name__": "program" if "inputs" not in task else "__main__"}
    sys.path.extend(task.get("libraries", []))
    try:
        exec(compile(task.get("preamble", ""), "<preamble>", "exec"), namespace)
        code = compile(task["program"], "<program>", "exec")
        if "inputs" not in task:
            exec(code, namespace)
    except BaseException as error:
        return send(channel, {"failed": words(error)})
    send(channel, {"loaded": True})
    if "inputs" in task:
        for text in task["inputs"]:
            send(channel, run_once(code, namespace, text, task["output"], task["seconds"]))
        return None
    objects: list = []
    while True:
        request = receive(channel, builder(objects.__getitem__))
        try:
            send(channel, {"value": answer(request, namespace, objects)}, lambda item: kept(item, objects))
        except BaseException as error:
            send(channel, {"raised": [type(error).__name__, words(error)]})


def answer(request, namespace, objects):
    """Return what a request asks for: a call of a name or of a kept object, or an attribute of one."""
    if "object" in request:
        target = objects[request["object"]]
        if "name" in request:
            target = getattr(target, request["name"])
    elif request["name"] in namespace:
        target = namespace[request["name"]]
    elif "Solution" in namespace:  # a method of it, as APPS and judges of its kind have it
        target = getattr(namespace["Solution"](), request["name"])
    else:
        raise NameError(f"name '{request['name']}' is not defined")
    return target(*request["arguments"], **request["named"]) if "arguments" in request else target


def kept(item, objects):
    """Keep an object that is no plain data and return its number."""
    objects.append(item)
    return len(objects) - 1


def words(error):
    """Return an exception as one short text."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an exception that cannot be printed"


def run_once(code, namespace, text, most, seconds):
    """Run `code` in a new process with `text` as its standard input; return output, status and why it stopped."""
    out_read, out_write = os.pipe()
    with open("/tmp/.input", "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open("/tmp/.input", os.O_RDONLY), 0)
            os.dup2(out_write, 1)
            os.closerange(3, 256)
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            status = _main(code, namespace)
        finally:
            os._exit(status)
    os.close(out_write)
    output, cause, deadline = b"", None, time.monotonic() + seconds
    while cause is None:
        left = deadline - time.monotonic()
        ready = left > 0 and select.select([out_read], [], [], left)[0]
        part = os.read(out_read, 1 << 16) if ready else None
        if part == b"":
            break
        output += part or b""
        cause = "time limit" if part is None else "output limit" if len(output) > most else None
    os.close(out_read)
    try:  # noqa: SIM105 (contextlib costs a millisecond at every start)
        os.kill(-1, 9)  # all that is left in this sandbox but us
    except OSError:
        pass
    return {"output": output[:most].decode("utf-8", "replace"), "status": os.waitpid(process, 0)[1], "cause": cause}


def _main(code, namespace):
    try:
        exec(code, namespace)
        status = 0
    except SystemExit as end:
        status = 0 if end.code in (None, 0) else 1
    sys.stdout.flush()
    return status


def answer_calls(program, calls, mark):
    """Load the program, answer all calls, and print the answers behind `mark`; for an executor without sockets."""
    out = os.dup(1)
    mute()
    namespace = {"__name__": "program"}
    replies: list = []
    try:
        exec(compile(program, "<program>", "exec"), namespace)
        for call in calls:
            try:
                replies.append({"value": decode(encode(answer(call, namespace, [])), lambda *tree: tree)})
            except BaseException as error:
                replies.append({"raised": [type(error).__name__, words(error)]})
    except BaseException as error:
        replies = [{"failed": words(error)}]
    os.write(out, mark.encode() + encode(replies).hex().encode() + b"\n")


class Remote:
    """A name or an object of the program's process, seen from the tests: it can be called and asked for attributes.

    It equals nothing but itself, is neither true nor false and has no items: the program's own operators prove nothing.
    """

    def __init__(self, channel, **where):
        self.__dict__["_where"] = (channel, where)

    def __call__(self, *arguments, **named):
        given = [at_hand(item) for item in arguments], {key: at_hand(item) for key, item in named.items()}
        return ask(self, arguments=given[0], named=given[1])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        channel, where = at_hand(self)._where
        return ask(Remote(channel, name=name, **where))

    def __bool__(self):
        raise TypeError("a value that is no plain data proves nothing")

    __iter__ = __bool__


def at_hand(item):
    """Return a name of the program as the object it stands for; anything else as it is."""
    return ask(item) if isinstance(item, Remote) and "name" in item._where[1] else item


def ask(remote, **more):
    """Send a request to the program's process and return its answer, or raise what the call raised."""
    channel, where = remote._where
    send(channel, dict(where, **more), lambda item: item._where[1]["object"])
    reply = receive(channel, builder(lambda number: Remote(channel, object=number)))
    if "raised" in reply:
        kind = getattr(__import__("builtins"), str(reply["raised"][0]), RuntimeError)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or kind is StopIteration:
            kind = RuntimeError
        raise kind(str(reply["raised"][1]))
    return reply["value"]


def serve_tests(channel, program):
    """Hand the program to its process, run every test, and report each as it ends."""
    task = receive(channel, builder(None))
    send(program, task["program"])
    limit(task["limits"])
    mute()
    receive(program, builder(None))
    send(channel, {"ready": True})
    try:
        loaded = receive(program, builder(None))
    except Gone as error:
        loaded = {"failed": f"the program: {error}"}
    if "failed" in loaded:
        return send(channel, {"failed": str(loaded["failed"])})
    namespace: dict = {"__name__": "tests"}
    try:
        exec(compile(task["setup"], "<setup>", "exec"), namespace)
        codes = [compile(test, "<test>", "exec") for test in task["tests"]]
    except BaseException as error:
        return send(channel, {"broken": words(error)})
    known = set(namespace) | set(dir(__import__("builtins")))
    for name in set().union(*map(names_of, codes)) - known:
        namespace[name] = Remote(program, name=name)
    if task["entry_point"]:
        namespace[task["entry_point"]] = namespace["candidate"] = Remote(program, name=task["entry_point"])
    for code in codes:
        try:
            exec(code, namespace)
            cause = None
        except Gone as error:
            cause = f"the program: {error}"
        except BaseException as error:
            cause = words(error)
        send(channel, {"cause": cause})


def names_of(code):
    """Return every global name that a code object and the functions in it may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            names |= names_of(constant)
    return names


def main():
    """Take a role, and end when the other side does."""
    role = sys.argv[1]
    try:
        if role == "version":
            os.write(1, sys.version.split()[0].encode())
        elif role == "program":
            serve_program(int(sys.argv[2]))
        else:
            serve_tests(int(sys.argv[2]), int(sys.argv[3]))
    except (Gone, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
