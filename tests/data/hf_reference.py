"""Transformers' logits, in an environment that has torch and transformers.

python hf_reference.py FOLDER      for each checkpoint folder in FOLDER: logits in float32 and
                                   bfloat16 to FOLDER/logits.npz, and transformers' own copy of the
                                   checkpoint, in several files, to FOLDER/NAME/theirs
python hf_reference.py             makes hf_goldens.npz beside this file, from hf_cases.py
"""

import sys
import tempfile
from pathlib import Path

import hf_cases
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def logits(folder: Path, dtype: torch.dtype, copy: Path | None = None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if copy is not None:
        model.save_pretrained(copy, max_shard_size="20KB")
    with torch.no_grad():
        return model.eval()(torch.tensor(hf_cases.TOKENS)).logits.float().numpy()[0]


def main() -> None:
    out = {}
    if len(sys.argv) > 1:
        root = Path(sys.argv[1])
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            out[folder.name] = logits(folder, torch.float32, folder / "theirs")
            out[folder.name + "/bfloat16"] = logits(folder, torch.bfloat16)
        np.savez(root / "logits.npz", **out)
        return
    with tempfile.TemporaryDirectory() as root:
        for name, config in hf_cases.CONFIGS.items():
            hf_cases.write(Path(root) / name, config)
            out[name] = logits(Path(root) / name, torch.float32)
            out[name + "/bfloat16"] = logits(Path(root) / name, torch.bfloat16)
    np.savez_compressed(Path(__file__).with_name("hf_goldens.npz"), **out)


if __name__ == "__main__":
    main()
