"""What people read: tables of estimates."""
