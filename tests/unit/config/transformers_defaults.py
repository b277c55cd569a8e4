"""What transformers takes absent config.json fields for: `transformers_defaults.py KIND...` as JSON.

Runs in a process of its own, because transformers must not meet the CPU stand-ins for CUDA.
"""

import json
import sys

from transformers import AutoConfig
from transformers.models.auto import modeling_auto


def main():
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    scalar = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    answers = {
        kind: {
            "classes": [causal[kind], scalar[kind]],
            "fields": AutoConfig.for_model(kind).to_dict(),
        }
        for kind in sys.argv[1:]
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
