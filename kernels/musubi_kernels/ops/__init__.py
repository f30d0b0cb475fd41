"""One folder per op: `__init__` declares it and its public function, `reference` and `native` are its bodies."""
