"""A model folder as one GGUF file, the form that llama.cpp and what stands on it (Ollama, LM Studio) read.

    head.py            the file's head: typed pairs and the table of tensors
    architecture.py    what a config.json says, in GGUF's words, and which tensors there must be
    vocabulary.py      what a tokenizer.json says, in GGUF's words
    export.py          all of it as a stream of known length

No tensor is computed with: 16-bit matrices go over as they are, rows are at most put in another order. So nothing but
the standard library is needed, and a server can write the file while it sends it, holding one piece at a time.
"""
