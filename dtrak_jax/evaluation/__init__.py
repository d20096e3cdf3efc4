"""How far scores can be trusted: against models that were retrained."""
