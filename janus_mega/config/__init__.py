"""What a run is made of: dataclasses, loading, derived arithmetic, validation. Imports no torch."""
