"""`python -m repdeploy`: the one upward import the contracts allow."""

from repdeploy_cli.app import main

if __name__ == "__main__":
    main()
