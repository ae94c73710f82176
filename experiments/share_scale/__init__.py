"""How Share behaves when hundreds of adapters arrive one batch after another."""
