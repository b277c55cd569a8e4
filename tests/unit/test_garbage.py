"""A start collects no garbage; from then on what is made is collected, what was there never."""

import subprocess
import sys

CODE = """
import gc
import weakref
from marlhf_mega.garbage import pause_collections, resume_collections

class Node:
    pass

def ring():
    node = Node()
    node.self = node
    return weakref.ref(node)

before = gc.get_freeze_count()  # Python 3.12 freezes some itself
resume_collections()
assert gc.isenabled() and gc.get_freeze_count() == before
gc.disable()
resume_collections()
assert not gc.isenabled()  # as the script wants it
gc.enable()
pause_collections()
early = ring()
many = [[] for _ in range(2000)]
assert early() is not None
resume_collections()
late = ring()
gc.collect()
assert gc.isenabled() and early() is not None and late() is None
"""


def test_what_a_start_leaves_is_never_looked_at():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)
