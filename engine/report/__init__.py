"""What people read: tables of estimates, plugins and comparisons."""
