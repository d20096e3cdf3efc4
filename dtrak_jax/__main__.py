from dtrak_jax.cli import main

main()
