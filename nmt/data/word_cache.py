import numpy as np
from typing import NamedTuple
class Cut(NamedTuple):
    ids: object; lengths: object; num_words:int; num_whole:int
class WordEncoder:
    def __init__(self, subwords):
        self.s=subwords; self.is_byte=np.zeros(subwords.size,bool)
        for i,p in enumerate(subwords.pieces(range(subwords.size))):
            self.is_byte[i]= p.startswith("<0x")
        self.is_byte[1]=True
    def encode(self,texts):
        ids=self.s.encode_batch(texts)
        from nmt.data.shards import ids_dtype
        return Cut(np.concatenate(ids).astype(ids_dtype(self.s.size)) if ids else np.zeros(0,ids_dtype(self.s.size)), np.array([len(i) for i in ids],np.int32), sum(len(t.split()) for t in texts), 0)
