"""The library behind the stage commands in scripts/. It never imports snakemake."""
