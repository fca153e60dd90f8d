"""Stand-in."""
from dataclasses import dataclass
from nmt.corpus.filters import _fingerprint as fingerprint, _rank as rank
from nmt.wording import counted

class Candidate:
    __slots__=("source","target","direction","score","num_source_words","num_target_words")
    def __init__(self, source, target, direction, score=None):
        self.source,self.target,self.direction,self.score=source,target,direction,score
        self.num_source_words=len(source.split()); self.num_target_words=len(target.split())

class HeldOutTexts(dict):
    @classmethod
    def of(cls, rows): 
        list(rows); return cls()

class Rules:
    names=("blank","identical","max_words","max_length_ratio")
    def __init__(self, corpus, held_out): self.config=corpus.filters
    def refusal(self,p):
        c=self.config
        if c.blank and not (p.source.strip() and p.target.strip()): return "blank"
        if c.identical and p.source.strip()==p.target.strip(): return "identical"
        fewer,more=sorted((p.num_source_words,p.num_target_words))
        if c.max_words and more>c.max_words: return "max_words"
        if c.max_length_ratio and more>c.max_length_ratio*fewer: return "max_length_ratio"
        return ""
    def scores(self,p): return {"max_words":max(p.num_source_words,p.num_target_words)}

@dataclass(frozen=True)
class KeyRule:
    name: str
    key: object
    why: str
def key_rules(config):
    return [KeyRule("duplicates", lambda p: fingerprint(f"{p.direction}\n{p.source}",p.target),"seen before")] if config.duplicates else []
def whys(corpus):
    config=corpus.filters
    return {
            "blank": "with a blank side",
            "identical": "the same on both sides",
            "max_words": f"with more than {counted(config.max_words, 'word')}",
            "max_length_ratio": f"with one side more than {config.max_length_ratio:g} times as long",
            "duplicates": "seen before",
            "max_pieces": f"with more than {counted(config.max_pieces, 'subword')}",
        }
