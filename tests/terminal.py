"""Programs in a terminal of a given width, and what such a terminal shows."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading

_PIECES = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def run_in_terminal(command, *, columns, env, timeout=300):
    """Run a program to its end.

    Returns:
        The exit code and what it has written.
    """
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in env.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=env | {"TERM": "xterm"}
    )
    os.close(inside)
    written = bytearray()

    def read():
        while True:
            try:
                written.extend(os.read(terminal, 1 << 16))
            except OSError:  # nobody has it open any more
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        code = process.wait(timeout=timeout)
    finally:
        process.kill()
        reader.join()
        os.close(terminal)
    return code, written.decode(errors="replace")


def screen(written, columns):
    """Return the lines that a terminal shows in the end, scrolled ones included.

    It knows what progress bars use: carriage return, cursor up, erase line.
    """
    lines, row, column = [[]], 0, 0
    for argument, command, control, text in _PIECES.findall(written):
        if command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            lines[row] = [] if argument == "2" else lines[row][:column]
        elif control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
        for character in text:
            if column == columns:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            line = lines[row]
            line += " " * (column + 1 - len(line))
            line[column] = character
            column += 1
        lines += [[] for _ in range(row + 1 - len(lines))]
    return ["".join(line).rstrip() for line in lines]
