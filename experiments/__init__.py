"""Figures and tables: each folder holds one result, the command that made it, and its conditions."""
