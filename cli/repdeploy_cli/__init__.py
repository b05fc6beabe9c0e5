"""The command line: parse, call, render. Importing it loads no tensor library."""
