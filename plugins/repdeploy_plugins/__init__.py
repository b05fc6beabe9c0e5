"""The families that ship with repdeploy, found like anybody else's through the entry points `repdeploy.families`."""
