from nanoghost.cli import main

main()
