"""Two tokenizers that implement only what the protocol asks of a member: greedy longest match, groups of digits."""

import json
from pathlib import Path

from jaxlm.core.configs import fingerprint
from jaxlm.data.tokenizers.protocol import Tokenizer, utf8


class GreedyTokenizer(Tokenizer):
    """The longest piece that matches, over bytes; every single byte is a piece."""

    special_ids = {"bos": 0, "eos": 0, "pad": 1, "<turn>": 2}

    def __init__(self, pieces=(b"the", b"th", b"    ", b"  ", b"ab", b"abc", b"\xc3\xa9", b"\xff\xff")):
        self.pieces = [b"", b"", b"", *(bytes([b]) for b in range(256)), *pieces]
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if piece}
        self.longest = max(map(len, self.pieces))

    @property
    def vocab_size(self):
        return len(self.pieces)

    @property
    def fingerprint(self):
        return fingerprint(["greedy", [p.hex() for p in self.pieces]])

    def encode(self, text):
        raw, ids, start = utf8(text), [], 0
        while start < len(raw):
            size = next(n for n in range(self.longest, 0, -1) if raw[start : start + n] in self.ids)
            ids.append(self.ids[raw[start : start + size]])
            start += size
        return ids

    def token_bytes(self, token):
        return self.pieces[token]

    def save(self, folder):
        Path(folder, "greedy.json").write_text(json.dumps([p.hex() for p in self.pieces]))


class DigitGroupTokenizer(Tokenizer):
    """Digits in groups of three from the left, everything else byte by byte."""

    special_ids = {"bos": 256, "eos": 257, "pad": 258}
    vocab_size = 259 + 1110
    fingerprint = fingerprint(["digit groups"])

    def encode(self, text):
        ids, group = [], b""
        for byte in utf8(text):
            if 48 <= byte < 58 and len(group) < 3:
                group += bytes([byte])
                continue
            ids += self._group(group)
            group = bytes([byte]) if 48 <= byte < 58 else b""
            if not group:
                ids.append(byte)
        return ids + self._group(group)

    @staticmethod
    def _group(group):
        # 10 groups of one digit, then 100 of two, then 1000 of three.
        return [259 + (10 ** len(group) - 10) // 9 + int(group)] if group else []

    def token_bytes(self, token):
        if token < 259:
            return bytes([token]) if token < 256 else b""
        rest, digits = token - 259, 1
        while rest >= 10**digits:
            rest -= 10**digits
            digits += 1
        return f"{rest:0{digits}d}".encode()

    def save(self, folder):
        Path(folder, "digits").touch()
