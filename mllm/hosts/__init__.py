"""Takes pretrained VLMs and audio LLMs whole: encoder, projector, decoder, processor and chat template as they are.

Knows classes of transformers by family. Does not know budgets, compressors, adapters or where weights come from.

    families.py   the literal registry, and what follows from a host's config alone
    tiles.py      features of images that are cut into tiles of one size
    maps.py       features of images whose tiles are read as one map, scaled down where it is large
    patches.py    features of images that keep their shape
    clips.py      features of audio clips
    channels.py   what decoders read of a token beside its embedding
    decoder.py    a decoder that reads such
    rows.py       tokens of text behind the rows of an image
    positions.py  positions of three dimensions
    encoder.py    a host's own encoder and projector behind the contract of an encoder
    tekken.py     hosts whose prompts are made by mistral-common
    processor.py  a host's own processor, called on one medium item at a time

A host whose decoder wants more than embeddings and a mask is built of these; a new kind of what it wants gets a file.
"""

from mllm.hosts.decoder import HostDecoder
from mllm.hosts.encoder import HostEncoder
from mllm.hosts.families import (
    HOSTS,
    HostFamily,
    build_host,
    find_family,
    host_class,
    host_facts,
    host_tiling,
    placeholder_id,
    reading_parts,
)
from mllm.hosts.processor import HostItem, HostProcessor, read_host_processor
from mllm.hosts.tekken import read_tekken_tokenizer, tekken_inputs

__all__ = [
    "HOSTS",
    "HostDecoder",
    "HostEncoder",
    "HostFamily",
    "HostItem",
    "HostProcessor",
    "build_host",
    "find_family",
    "host_class",
    "host_facts",
    "host_tiling",
    "placeholder_id",
    "read_host_processor",
    "read_tekken_tokenizer",
    "reading_parts",
    "tekken_inputs",
]
