#!/usr/bin/env bash
# Registers a service with its app roles, makes its service principal, and assigns
# one of the roles to a managed identity: the three steps of the article, with the
# Azure CLI. It may be run again: what is there is left as it is.
#
#   ./register.sh https://myapp.aztoso.com "My app" consumer IDENTITY-OBJECT-ID
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 4 ]; then
	echo "usage: $0 APP-ID-URI DISPLAY-NAME ROLE IDENTITY-OBJECT-ID" >&2
	exit 2
fi
uri=$1 name=$2 role=$3 identity=$4
graph=https://graph.microsoft.com/v1.0

# 1. The registration. A role that is changed in the manifest later is changed with
# "az ad app update --id APPID --app-roles", once it is disabled: that is for a
# person to decide.
app=$(az ad app list --filter "identifierUris/any(u:u eq '$uri')" --query '[0].appId' -o tsv)
if [ -z "$app" ]; then
	app=$(az ad app create --display-name "$name" --identifier-uris "$uri" --app-roles @manifest.json --query appId -o tsv)
	echo "registered $uri as $app"
else
	echo "$uri is registered as $app"
fi

# 2. The service principal, to which roles are assigned.
service=$(az ad sp list --filter "appId eq '$app'" --query '[0].id' -o tsv)
if [ -z "$service" ]; then
	service=$(az ad sp create --id "$app" --query id -o tsv)
	echo "made the service principal $service"
else
	echo "its service principal is $service"
fi

# 3. The assignment. The object ID of a user-assigned identity is its principalId:
#   az identity show -g GROUP -n NAME --query principalId -o tsv
role_id=$(az ad app show --id "$app" --query "appRoles[?value=='$role'].id | [0]" -o tsv)
if [ -z "$role_id" ]; then
	echo "$uri declares no app role $role: see manifest.json" >&2
	exit 1
fi
assigned=$(az rest --method GET --uri "$graph/servicePrincipals/$identity/appRoleAssignments" \
	--query "value[?resourceId=='$service' && appRoleId=='$role_id'].id | [0]" -o tsv)
if [ -z "$assigned" ]; then
	az rest --method POST --uri "$graph/servicePrincipals/$identity/appRoleAssignedTo" \
		--headers Content-Type=application/json \
		--body "{\"principalId\": \"$identity\", \"resourceId\": \"$service\", \"appRoleId\": \"$role_id\"}" -o none
	echo "assigned $role to $identity: it is in the next token, which may be up to 24 hours away"
else
	echo "$identity has $role already"
fi
