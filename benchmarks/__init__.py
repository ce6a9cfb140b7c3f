"""How long an application is kept from its database, measured beside the script that this product replaces."""
