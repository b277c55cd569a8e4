"""What AutoTokenizer makes of texts: {name: {folder, texts}} -> {name: {ids, texts, empty}}."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

found = {}
for name, question in json.loads(Path(sys.argv[1]).read_text()).items():
    tokenizer = AutoTokenizer.from_pretrained(question["folder"])
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in question["texts"]]
    found[name] = {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "empty": tokenizer("").input_ids,
    }
sys.stdout.write(json.dumps(found))
