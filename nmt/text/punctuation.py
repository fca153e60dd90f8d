def normaliser(p,l): return lambda t:t
