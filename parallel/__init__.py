"""How a model is spread over processes. Reads only the facts that modules declare; see ``facts.py``."""
