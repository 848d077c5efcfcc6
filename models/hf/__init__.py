"""Hugging Face checkpoints in and out: `config.json` beside safetensors files.

    names   which tensor of a checkpoint is which part of which parameter
    read    folders and hub ids, configuration, headers of the files; refuses what does not fit
    load    tensors, piece by piece, into sharded arrays
    save    a policy as a folder that transformers and vLLM load
    export  a run folder's checkpoint as such a folder: python -m models.hf export
    adapter a trained adapter in peft's form: python -m models.hf export --adapter
    merge   the weighted mean of several checkpoints: python -m models.hf merge
    new     random weights around a tokenizer: python -m models.hf new
    inspect what a checkpoint is and needs, without loading it: python -m models.hf inspect

Everything a user can cause raises ValueError.
"""

from models.hf.export import describe_model, described_lora, export_policy
from models.hf.load import load_fused, load_policy
from models.hf.read import checkpoint_folder, read_config
from models.hf.save import save_policy

__all__ = [
    "checkpoint_folder",
    "describe_model",
    "described_lora",
    "export_policy",
    "load_fused",
    "load_policy",
    "read_config",
    "save_policy",
]
