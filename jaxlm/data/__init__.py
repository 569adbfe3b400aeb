"""From files of text to batches: tokenizers, sources, the tokenized store, packing, mixtures, iterators."""
