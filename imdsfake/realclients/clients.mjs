// Gets tokens with clients from npm that know nothing of the fake, where they look
// for the metadata service, and in the place of App Service; verifies them with jose.
import { ManagedIdentityCredential } from "@azure/identity";
import { ManagedIdentityApplication } from "@azure/msal-node";
import { createRemoteJWKSet, jwtVerify } from "jose";

const endpoint = "http://169.254.169.254";
const resource = "https://myapp.aztoso.com";
const tenant = "11111111-2222-4333-8444-555555555555";
const daemon = "da000000-0000-4000-8000-000000000001";

const keys = createRemoteJWKSet(new URL(`${endpoint}/${tenant}/discovery/keys`));

// verify checks a token as a service does, and that it is the identity's.
async function verify(token, clientId) {
	const { payload } = await jwtVerify(token, keys, {
		issuer: `https://sts.windows.net/${tenant}/`, audience: resource, algorithms: ["RS256"],
	});
	const want = clientId ? [daemon, undefined] : [payload.appid, "consumer"];
	if (payload.appid !== want[0] || payload.roles?.join() !== want[1] || payload.oid !== payload.sub) {
		throw new Error(`appid is ${payload.appid}, roles is ${payload.roles}, oid is ${payload.oid}`);
	}
	if (!clientId && payload.appid === daemon) throw new Error("it is the daemon's");
}

async function identity(clientId) {
	const credential = clientId ? new ManagedIdentityCredential({ clientId }) : new ManagedIdentityCredential();
	return (await credential.getToken(`${resource}/.default`)).token;
}

async function msal(clientId) {
	const app = new ManagedIdentityApplication(clientId
		? { managedIdentityIdParams: { userAssignedClientId: clientId } } : {});
	return (await app.acquireToken({ resource, forceRefresh: true })).accessToken;
}

let failed = false;

async function check(name, client, clientId) {
	try {
		await verify(await client(clientId), clientId);
		console.log(`ok   ${name}`);
	} catch (e) {
		failed = true;
		console.log(`FAIL ${name}: ${e.message}`);
	}
}

// host puts this process in the place of another host.
async function host(name) {
	const text = await (await fetch(`${endpoint}/imdsfake/env?host=${name}`)).text();
	for (const [, key, value] of text.matchAll(/^export (\w+)='(.*)'$/gm)) process.env[key] = value;
}

await check("@azure/identity", identity);
await check("@azure/identity, user-assigned", identity, daemon);
await check("@azure/msal-node", msal);
await check("@azure/msal-node, user-assigned", msal, daemon);
await host("appservice");
await check("@azure/identity in App Service", identity);
await check("@azure/identity in App Service, user-assigned", identity, daemon);
await check("@azure/msal-node in App Service", msal);
await check("@azure/msal-node in App Service, user-assigned", msal, daemon);

process.exit(failed ? 1 : 0);
